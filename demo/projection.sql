-- The projection of each way: applies what is new, again and again.
SELECT demo.apply_:way();
\sleep 20 ms
