"""The command line `slab-kernels`.

    main            the commands by name, and the console script
    options         every option and argument
    meanings        what the text of an option means
    examples        the examples under each --help
    console         how a command ends: its output, its errors, its exit code
    progress        a bar, or a line every half minute
    threads         how torch's threads wait for one another
    layers          the table of a model's layers
    opening         a model folder, opened with its tokenizer

One file for each group of commands: compression (compress, train, decompress), models (eval,
inspect, check), generation (generate), kernels (bench, tune, explain), machine (info), report.
"""
