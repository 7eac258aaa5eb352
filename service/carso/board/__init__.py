"""What the processes of one service share: nothing where it is one, and a piece of memory where it has workers."""
