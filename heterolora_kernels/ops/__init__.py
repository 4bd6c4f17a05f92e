"""The op contract: schemas, checks, fakes, the autograd function, the ledger's columns and the dropout generator."""
