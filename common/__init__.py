"""What every room stands on: errors, files, checks of numbers, arrays, facts about the machine."""
