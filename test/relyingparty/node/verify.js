// Verifies a token by an issuer's discovery document, as two libraries do it:
// node verify.js ISSUER AUDIENCE ALGORITHM < token
import { createRemoteJWKSet, jwtVerify } from "jose";
import { discovery, None } from "openid-client";
import { readFileSync } from "node:fs";

const [issuer, audience, algorithm] = process.argv.slice(2);
const token = readFileSync(0, "utf8").trim();

const found = await discovery(new URL(issuer), audience, undefined, None());
const metadata = found.serverMetadata();
if (metadata.issuer !== issuer) {
  throw new Error(`the issuer is ${metadata.issuer}`);
}
if (!metadata.id_token_signing_alg_values_supported.includes(algorithm)) {
  throw new Error(`${algorithm} is not among the algorithms`);
}
const keys = createRemoteJWKSet(new URL(metadata.jwks_uri));
const { payload } = await jwtVerify(token, keys, { issuer, audience, algorithms: [algorithm] });
console.log(payload.sub);
process.exit(0); // connections that are kept alive would keep it for seconds
