"""What attaching to a stock model must do, checked on one tiny model of a package.

A check takes a `Subject` and returns None where it holds, `Inapplicable` with the reason where there is nothing to
check, and otherwise what is wrong. `checks.CHECKS` names them all.
"""
