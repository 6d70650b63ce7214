"""Task numbers and boxes, and what a plan costs, by formula."""
