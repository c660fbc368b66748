-- One more writer of each way: a transaction that stays open for 2 seconds, again and again.
BEGIN;
SELECT demo.push_:way(1000);
\sleep 2 s
COMMIT;
\sleep 500 ms
