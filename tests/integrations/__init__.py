"""fastlstm inside the libraries that it is for, with the real packages: `pip install .[integrations]`."""
