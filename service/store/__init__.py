"""What lasts: the database, uploads and results as files, and the steps between schemas."""
