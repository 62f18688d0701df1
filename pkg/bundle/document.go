package bundle

import "encoding/json"

// Usable returns a bundle document (SPIFFE's JSON format) without what the
// standards say to ignore: keys of an unknown type or use, X.509 authorities
// without a certificate, and certificates after the first of one key
// (X509-SVID §6.2, Trust Domain and Bundle §4.2). WIT authorities that cannot
// be one are left out too. A parser that is stricter can then read it. What is
// no such document comes back as it is.
func Usable(document []byte) []byte {
	var members map[string]json.RawMessage
	var keys []map[string]json.RawMessage
	if json.Unmarshal(document, &members) != nil || members["keys"] == nil || json.Unmarshal(members["keys"], &keys) != nil {
		return document
	}
	usable := make([]map[string]json.RawMessage, 0, len(keys))
	for _, key := range keys {
		if kty := text(key["kty"]); kty != "EC" && kty != "RSA" && kty != "OKP" {
			continue
		}
		switch text(key["use"]) {
		case "jwt-svid":
		case "wit-svid":
			// The standard incubates: a key that follows another draft of it must not
			// cost the rest of the bundle. WIT-SVID §2.3, §6.1: RSA or ECDSA, a key ID.
			if text(key["kid"]) == "" || text(key["kty"]) == "OKP" {
				continue
			}
		case "x509-svid":
			var x5c []json.RawMessage
			if json.Unmarshal(key["x5c"], &x5c) != nil || len(x5c) == 0 {
				continue
			}
			first, err := json.Marshal(x5c[:1])
			if err != nil {
				continue
			}
			key["x5c"] = first
		default:
			continue
		}
		usable = append(usable, key)
	}
	encoded, err := json.Marshal(usable)
	if err != nil {
		return document
	}
	members["keys"] = encoded
	if out, err := json.Marshal(members); err == nil {
		return out
	}
	return document
}

// text returns the string that a JSON value is, or "".
func text(value json.RawMessage) (s string) {
	if json.Unmarshal(value, &s) != nil {
		return ""
	}
	return s
}
