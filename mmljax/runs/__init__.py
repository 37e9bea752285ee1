"""What a run leaves in its directory: metrics, results, plots and the HTML report.

``workdir`` locks the directory, ``writer``, ``sessions``, ``recorder``, ``throughput``,
``progress`` and ``loggers`` write during training, ``reader`` reads the files back as a table,
``plot`` and ``html`` draw it. Training, inference and the command line may import this package; it
imports retrieval, data and the root modules.
"""
