"""What serves the scripts of the top level. Nothing in here imports one of them."""
