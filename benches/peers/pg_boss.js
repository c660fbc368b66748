// pg-boss 10.4.2 (npm): jobs by send, worked on by fetch and complete, so many loops in this process. Its work() polls every 2 seconds (0.5 at
// the least), so a loop of fetch and complete is what it can do at most. Maintenance and schedules are off while it is measured.
// Docs: https://timgit.github.io/pg-boss/#/./api/jobs?id=fetchname-options
const PgBoss = require("pg-boss");

module.exports = async () => {
    const boss = new PgBoss({ max: 100, supervise: false, schedule: false });
    boss.on("error", (error) => { throw error; });
    await boss.start();
    await boss.createQueue("bench");
    return {
        async fill(n) {
            for (let from = 0; from < n; from += 10000) {
                await boss.insert(Array.from({ length: Math.min(10000, n - from) }, () => ({ name: "bench", data: { n: 1 } })));
            }
        },
        enqueue: () => boss.send("bench", { n: 1 }).then(() => 0),
        async work(workers, state, running) {
            await Promise.all(Array.from({ length: workers }, async () => {
                while (running()) {
                    const [job] = await boss.fetch("bench");
                    await boss.complete("bench", job.id);
                    state.done += 1;
                }
            }));
        },
        end: () => boss.stop({ graceful: false }),
    };
};
