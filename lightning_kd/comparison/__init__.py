"""Several runs, each with several seeds, side by side.

==================  ================================================================
``experiment``      runs that differ in what they are given
``reading``         experiment files
``metrics``         what a table shows of a run
``placeholders``    values that the command line gives, and students of other runs
``plan``            the runs of an experiment, one for each seed and budget
``order``           which run comes before which
``outputs``         files that runs write elsewhere
``contents``        digests of what runs read
``run_files``       records of a run, complete and as they were written
``records``         what a run has left, and whether it is still what is asked for
``workers``         commands in processes that have imported everything already
``places``          the directory of all runs
``execution``       the runs in turn, with a line for each
``statistics``      means, deviations and paired differences
``curves``          values over steps and seconds, from event files
``figures``         pictures
``provenance``      where numbers come from, without a user's directories
``documents``       tables between two marks of a document
``tables``          what the terminal and the page show
``report``          the page, the numbers and the pictures
==================  ================================================================
"""
