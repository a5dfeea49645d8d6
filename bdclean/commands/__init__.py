"""The commands of `bdclean` that Lightning does not bring, one file each."""
