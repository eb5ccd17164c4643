// One ONNX file in ONNX Runtime's JavaScript packages: the twin of in_python.py, in node and in the pages of a browser.
//
//     node in_javascript.mjs onnxruntime-node|onnxruntime-web FOLDER-OF-node_modules ORDER.json

const WARM = 2, LEAST = 3;

async function opened(ort, bytes, options) {
  const session = await ort.InferenceSession.create(bytes, options);
  const [input] = session.inputNames, [output] = session.outputNames;
  return async (tensor) => (await session.run({ [input]: tensor }))[output];
}

// `images`: Float32Array of `shape` [n, c, h, w]; `peak` gives MB. Gives {values, ...} as `measured` of in_python.py does.
export async function measured(ort, { file, beside, images, shape, seconds, options, peak = () => NaN }) {
  const size = images.length / shape[0], values = [];
  const image = (n) => new ort.Tensor("float32", images.slice(n * size, (n + 1) * size), [1, ...shape.slice(1)]);
  const before = peak(), told = (error) => String(error?.message ?? error).split("\n")[0].slice(0, 200);
  let step = "loading", run, load_s;
  try {
    const begun = performance.now();
    run = await opened(ort, file, options);
    load_s = (performance.now() - begun) / 1000;
    step = "running";
    for (let n = 0; n < shape[0]; n++) values.push(...(await run(image(n))).data);
  } catch (error) {
    return { failed: `${step}: ${told(error)}` };
  }
  const runs = { ms: run }, least = {}, mb = peak() - before;
  try {
    if (beside) runs.float_ms = await opened(ort, beside, options);
  } catch (error) {
    return { load_s, mb, values, no_time: told(error) };
  }
  const begun = performance.now();
  for (let n = 0; n < WARM + LEAST || performance.now() - begun < 1000 * seconds; n++)
    for (const [name, each] of Object.entries(runs)) {
      const start = performance.now();
      await each(image(0));
      if (n >= WARM) least[name] = Math.min(least[name] ?? Infinity, performance.now() - start);
    }
  return { load_s, mb, values, ...least };
}

if (globalThis.process?.argv?.[4]) {
  const { readFileSync, writeFileSync } = await import("node:fs");
  const { createRequire } = await import("node:module");
  const [name, folder, path] = process.argv.slice(2);
  const ort = createRequire(`${folder}/`)(name);
  if (ort.env?.wasm) ort.env.wasm.numThreads = 1;
  const order = JSON.parse(readFileSync(path));
  const raw = readFileSync(order.raw);
  const images = new Float32Array(raw.buffer, raw.byteOffset, raw.length / 4);
  const options = { intraOpNumThreads: 1, logSeverityLevel: 3, extra: { session: { x64quantprecision: "1" } } };
  const found = await measured(ort, {
    file: readFileSync(order.file),
    beside: order.beside && readFileSync(order.beside),
    images,
    shape: order.shape,
    seconds: order.seconds,
    options,
    peak: () => Number(readFileSync("/proc/self/status", "utf8").match(/VmHWM:\s*(\d+)/)[1]) / 1024,
  });
  if (found.values) writeFileSync(order.result, new Uint8Array(Float32Array.from(found.values).buffer));
  delete found.values;
  console.log(`\n${JSON.stringify(found)}`);
  process.exit(0);
}
