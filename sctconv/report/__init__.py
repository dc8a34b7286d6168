"""Pages of pictures: what a file holds, how a run went."""
