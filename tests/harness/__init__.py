"""What the tests share: no test file imports from another, what two need stands here."""
