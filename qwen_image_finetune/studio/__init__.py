"""The studio: a page in the browser, from a folder of pictures to a LoRA. It starts the verbs of `qif` as processes and
reads the files that runs write; nothing below knows that it exists.

    shelf       what lies in the folder, and that nothing outside it is touched
    guard       who may ask for anything at all
    pairs, bin, inbox, uploads, looking    a data set: seen, edited, filled, looked through
    form        a run, from the declarations of the configuration
    jobs, keeper, queue                    what waits, runs and has ended, on disk
    watching, judging, trying              a run while it goes on, runs side by side, pictures drawn with them
    app, routes_*                          which address does what
"""
