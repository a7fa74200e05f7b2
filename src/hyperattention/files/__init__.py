"""Files that a user names: texts that are read, folders of models, and what may be written."""
