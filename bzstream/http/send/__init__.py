"""Long responses: whose turn it is, the threads that call sendfile, and pages that have to be read from the disk."""
