"""The page in the browser, from a folder of pictures to a LoRA: starts verbs as processes, reads what runs write.

Nothing below knows that it exists: a run that was started in a terminal is seen as well.

    shelf                       what lies in the folder, and that nothing outside it is touched
    guard                       who may ask for anything at all
    pairs, bin, thumbnails      a data set, seen and edited
    inbox, uploads              filled with what is dropped onto the page
    looking, captioning         processes that look through it for flaws, and propose captions
    form                        a run, from the declarations of the configuration
    jobs, keeper, queue         what waits, runs and has ended, on disk
    running, verbs              jobs from what a person asks for; verbs that a page waits for
    watching, machine           a run while it goes on
    app, server, routes_*       which address does what
"""
