"""What is made with maps and models beyond the map itself."""
