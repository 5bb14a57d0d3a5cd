"""How an experiment is run; nothing here is about the paper, and no method is known by name.

data         images in
distributed  one run on several processes
checkpoint   what is saved
run          `for step in run:` - resume, seeds, signals, log, checkpoints
metrics      how good samples are
evaluation   rows of a table: measured once, kept, taken over when a run is resumed
plots        the pictures of a run
explorer     a run as a page to play with
options      a script's configuration, command line, devices and exit codes
"""
