-- One of the 16 writers of each way: a transaction that stays open for a random time; one in ten rolls back.
\set hold random(0, 20)
\set fate random(1, 10)
BEGIN;
SELECT demo.push_:way(:client_id);
\sleep :hold ms
\if :fate = 1
ROLLBACK;
\else
COMMIT;
\endif
