"""The page of runtimes: fastlstm beside every other runtime of recurrent layers that is installed, on the CPU."""
