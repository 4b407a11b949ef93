"""What a command leaves in the catalogue, even if it is killed: new adapters, bases and variants, and their ties."""
