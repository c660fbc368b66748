// One queue, worked on by so many workers of one Node process: enqueues, or claims and completes, for a while, and prints jobs a second.
//   node queue.js (lockstep|graphile|pgboss) (fill COUNT | enqueue CLIENTS SECONDS | work WORKERS SECONDS)
// The work is nothing, so what is measured is the queue. Each job is enqueued, claimed and completed by itself.
const { Pool } = require("pg");

const [engine, verb, ...numbers] = process.argv.slice(2);
const [count, seconds] = numbers.map(Number);

const engines = {
    async lockstep() {
        const pool = new Pool({ max: 100 });
        return {
            fill: (n) => pool.query("SELECT lockstep.job_enqueue('bench', n::text, 'work', '{\"n\": 1}') FROM generate_series(1, $1) AS n", [n]),
            enqueue: (key) => pool.query("SELECT * FROM lockstep.job_enqueue('bench', $1, 'work', '{\"n\": 1}')", [key]),
            async work(workers, until) {
                let done = 0;
                await Promise.all(Array.from({ length: workers }, async () => {
                    const client = await pool.connect();
                    while (Date.now() < until) {
                        const { rows } = await client.query("SELECT * FROM lockstep.job_claim('bench', 'bench')");
                        if (rows.length === 0) {
                            throw new Error("no job is left");
                        }
                        await client.query("SELECT lockstep.job_complete($1, $2)", [rows[0].job_id, rows[0].token]);
                        done += 1;
                    }
                    client.release();
                }));
                return done;
            },
            end: () => pool.end(),
        };
    },

    async graphile() {
        const { run, makeWorkerUtils, Logger } = require("graphile-worker");
        const pool = new Pool({ max: 100 });
        const logger = new Logger(() => () => {});
        const utils = await makeWorkerUtils({ pgPool: pool, logger });
        await utils.migrate();
        return {
            fill: (n) => pool.query("SELECT graphile_worker.add_job('work', '{\"n\": 1}', job_key => n::text) FROM generate_series(1, $1) AS n", [n]),
            enqueue: (key) => utils.addJob("work", { n: 1 }, { jobKey: key }),
            async work(workers, until) {
                let done = 0;
                const runner = await run({
                    pgPool: pool, logger, concurrency: workers, noHandleSignals: true, taskList: { work: () => { done += 1; } },
                });
                await new Promise((resolve) => setTimeout(resolve, until - Date.now()));
                const counted = done;
                await runner.stop();
                return counted;
            },
            end: async () => { await utils.release(); await pool.end(); },
        };
    },

    async pgboss() {
        const PgBoss = require("pg-boss");
        const boss = new PgBoss({ max: 100, supervise: false, schedule: false });
        boss.on("error", (error) => { throw error; });
        await boss.start();
        await boss.createQueue("bench");
        return {
            async fill(n) {
                for (let from = 0; from < n; from += 10000) {
                    const length = Math.min(10000, n - from);
                    await boss.insert(Array.from({ length }, () => ({ name: "bench", data: { n: 1 } })));
                }
            },
            enqueue: () => boss.send("bench", { n: 1 }),
            async work(workers, until) {
                let done = 0;
                await Promise.all(Array.from({ length: workers }, async () => {
                    while (Date.now() < until) {
                        const [job] = await boss.fetch("bench");
                        await boss.complete("bench", job.id);
                        done += 1;
                    }
                }));
                return done;
            },
            end: () => boss.stop({ graceful: false }),
        };
    },
};

async function main() {
    const queue = await engines[engine]();
    if (verb === "fill") {
        await queue.fill(count);
    } else {
        const until = Date.now() + seconds * 1000;
        let done = 0;
        if (verb === "work") {
            done = await queue.work(count, until);
        } else {
            await Promise.all(Array.from({ length: count }, async (_, client) => {
                for (let n = 0; Date.now() < until; n += 1) {
                    await queue.enqueue(`new ${process.pid} ${client} ${n}`);
                    done += 1;
                }
            }));
        }
        console.log(done / seconds);
    }
    await queue.end();
    process.exit(0);
}

main().catch((error) => {
    console.error(error);
    process.exit(1);
});
