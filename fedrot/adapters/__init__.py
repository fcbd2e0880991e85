"""What one adapter is: keys, shapes, configuration, folder. Files become an ``Update``, and an ``Update`` becomes files."""
