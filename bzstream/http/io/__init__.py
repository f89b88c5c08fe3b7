"""Sockets, the event loop and time: the server, its connections, transports, timers and limits."""
