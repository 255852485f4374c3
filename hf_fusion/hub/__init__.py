"""Everything that speaks to the Hub: find, check, load, describe, publish; `server/` is the embedded one."""
