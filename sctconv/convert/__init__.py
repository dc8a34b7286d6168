"""Dense checkpoint in, .sct file out."""
