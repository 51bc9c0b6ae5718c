"""What a job is: its value, its kinds, its rows in the database, and whose turn it is."""
