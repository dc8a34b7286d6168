"""torch: factored layers, models made of them, generation and evaluation."""
