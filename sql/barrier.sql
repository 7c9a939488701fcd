-- A commit of our own that writes WAL and so waits for the standbys; transactions without WAL wait for nobody.
-- Role: any, in a session with synchronous_commit = on. Versions: 14 to 18. Columns: position.
select pg_logical_emit_message(true, 'pgvigil', '') as position;
