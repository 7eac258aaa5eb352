// Check custom resources against their operators' schemas: a JSON array of them on standard input; a line per mistake
// on standard output. The packages are looked for where NODE_PATH says.
const fs = require("node:fs");

const packages = {
  "monitoring.coreos.com": "@kubernetes-models/prometheus-operator",
  "keda.sh": "@kubernetes-models/keda",
};

for (const resource of JSON.parse(fs.readFileSync(0, "utf8"))) {
  const [group] = resource.apiVersion.split("/");
  const model = require(`${packages[group]}/${resource.apiVersion}/${resource.kind}`)[resource.kind];
  try {
    new model(resource).validate();
  } catch (error) {
    console.log(`${resource.kind} ${resource.metadata.name}: ${error.message}`);
  }
}
