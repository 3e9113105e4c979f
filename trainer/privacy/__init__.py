"""What a synthetic set gives away of the real images behind it: distances, near copies, membership inference."""
