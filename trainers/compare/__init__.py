"""`pcpo compare`: train one config with several methods and seeds, and compare the results."""
