"""The machine under the package: where a result was made, files, random numbers, memory."""
