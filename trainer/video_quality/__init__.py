"""How good synthetic clips are beside real ones: Frechet video distances, and how much they differ from each other."""
