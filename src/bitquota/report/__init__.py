"""Plans, matrices and comparisons for people: text, pictures, pages."""
