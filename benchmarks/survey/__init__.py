"""What fuse makes of other people's networks: ``python -m benchmarks.survey``; its --help says what a row has.

=============  =========================================================================
``rows``       what is known of one network, and its line in a file
``networks``   which networks there are, how each is built, and which inputs it takes
``measure``    what is done with one network, in a process of its own
``processes``  a process for each network, and what ended it
``page``       what rows say together
``__main__``   the command
=============  =========================================================================
"""
