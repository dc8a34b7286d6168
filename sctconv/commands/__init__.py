"""One file a command: options in, one library call, its result printed."""
