"""`python -m bzstream.node <role>`: how the supervisor starts a child process."""

from bzstream.node.child import main

main()
