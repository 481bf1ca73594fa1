"""One page to look at, made of the content of a report in JSON."""
