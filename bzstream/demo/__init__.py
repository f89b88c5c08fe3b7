"""The demo: toy models, toy miners, and a node of its own to play a round with.

running_node  `bzstream serve` as a process, and a plain client of it; the tests and the benches start nodes with it too
checkpoint    a checkpoint in the real format, made of noise, without torch
toy_model     a mixture-of-experts model small enough to train in seconds, and the files that cheats send
stage         a folder, keys, a node and the commands that the demo runs
distribution  publish, download, what is refused, submit
scoring_round a round of training and scoring

Uses the commands of `bzstream` as processes. May import `chain`, `client` and what lies below them.
"""
