// Emmett 0.42.0 (npm @event-driven-io/emmett-postgresql): appends by appendToStream with the expected stream version, one event a call; a consumer
// is its own consumer() with one processor, whose handler writes to the read model by the context's connection, that is in the transaction
// that moves the checkpoint. Its reader stays below pg_snapshot_xmin.
// Docs: https://event-driven-io.github.io/emmett/getting-started.html, https://event-driven-io.github.io/emmett/api-reference/
const { Pool } = require("pg");
const { getPostgreSQLEventStore } = require("@event-driven-io/emmett-postgresql");
const { STREAM_DOES_NOT_EXIST } = require("@event-driven-io/emmett");

module.exports = async () => {
    const host = encodeURIComponent(process.env.PGHOST);
    const connectionString = `postgresql://postgres@/${process.env.PGDATABASE}?host=${host}&port=${process.env.PGPORT}`;
    const pool = new Pool({ max: 100 });
    const store = getPostgreSQLEventStore(connectionString, { connectionOptions: { pool } });
    await store.schema.migrate();
    const event = (data) => [{ type: "paid", data }];
    return {
        append: (id, sequence, data) => store.appendToStream(`order-${id}`, event(data), {
            expectedStreamVersion: sequence === 1 ? STREAM_DOES_NOT_EXIST : BigInt(sequence - 1),
        }).then(() => 0),

        // Without an expected version a concurrent append may still be refused, as an ExpectedVersionConflictError; the caller tries again.
        async appendHot(data) {
            for (let failed = 0; ; failed += 1) {
                try {
                    await store.appendToStream("order-hot", event(data));
                    return failed;
                } catch (error) {
                    if (error.errorCode !== 412 && error.code !== "23505") {
                        throw error;
                    }
                }
            }
        },

        async consume(consumer, size, poll, ended) {
            const consuming = store.consumer({ pulling: { batchSize: size, pullingFrequencyInMs: poll } });
            consuming.reactor({
                processorId: `consumer ${consumer}`,
                startFrom: "CURRENT",
                connectionOptions: { connectionString, pool },
                eachMessage: async (message, context) => {
                    await context.connection.client.query({
                        name: "apply", text: "INSERT INTO bench.applied VALUES ($1, $2)", values: [consumer, String(message.metadata.globalPosition)],
                    });
                    return ended(1) ? { type: "STOP" } : undefined;
                },
            });
            await consuming.start();
        },

        end: () => pool.end(),
    };
};
