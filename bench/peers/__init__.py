"""The servers and clients that bzstream is measured beside, each as small as its own documentation shows it."""
