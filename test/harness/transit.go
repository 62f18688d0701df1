package harness

import (
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"time"
)

// TransitToken is that which [Transit] takes.
const TransitToken = "hvs.CAESIFt0a2VuLW9mLXRlc3Rz"

// Transit is the transit engine of a Vault, at the mount "pki/transit" in the
// namespace "team/".
func Transit(ring *KeyRing) http.Handler {
	const at = "/v1/pki/transit/"
	mux := http.NewServeMux()
	refuse := func(w http.ResponseWriter, code int, text ...string) {
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(map[string]any{"errors": append([]string{}, text...)})
	}
	reply := func(w http.ResponseWriter, data any) {
		_ = json.NewEncoder(w).Encode(map[string]any{"request_id": "1", "lease_id": "", "renewable": false, "lease_duration": 0, "data": data})
	}
	deletable := make(map[string]bool)
	mux.HandleFunc("POST "+at+"keys/{name}", func(w http.ResponseWriter, r *http.Request) {
		var in struct {
			Type       string `json:"type"`
			Exportable bool   `json:"exportable"`
			Backup     bool   `json:"allow_plaintext_backup"`
		}
		err := json.NewDecoder(io.LimitReader(r.Body, 1<<20)).Decode(&in)
		kind := map[string]string{
			"ecdsa-p256": "ec-p256", "ecdsa-p384": "ec-p384", "rsa-2048": "rsa-2048", "rsa-3072": "rsa-3072", "rsa-4096": "rsa-4096",
		}[in.Type]
		if err != nil || kind == "" || in.Exportable || in.Backup {
			refuse(w, http.StatusBadRequest, "unknown key type "+in.Type)
			return
		}
		if ring.keys[r.PathValue("name")] == nil { // else nothing happens
			ring.make(r.PathValue("name"), kind, nil)
		}
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("GET "+at+"keys/{name}", func(w http.ResponseWriter, r *http.Request) {
		k := ring.keys[r.PathValue("name")]
		if k == nil {
			refuse(w, http.StatusNotFound)
			return
		}
		reply(w, map[string]any{
			"name": k.id, "type": k.kind, "latest_version": 1, "deletion_allowed": deletable[k.id], "exportable": false,
			"keys": map[string]any{"1": map[string]any{
				"name": k.kind, "public_key": ring.publicPEM(k), "creation_time": k.created.Format(time.RFC3339Nano),
			}},
		})
	})
	mux.HandleFunc("POST "+at+"sign/{name}/{hash}", func(w http.ResponseWriter, r *http.Request) {
		var in struct {
			Input      []byte `json:"input"`
			Prehashed  bool   `json:"prehashed"`
			Version    int    `json:"key_version"`
			Algorithm  string `json:"signature_algorithm"`
			Marshaling string `json:"marshaling_algorithm"`
		}
		err := json.NewDecoder(io.LimitReader(r.Body, 1<<20)).Decode(&in)
		k := ring.keys[r.PathValue("name")]
		if k == nil {
			refuse(w, http.StatusBadRequest, "signing key not found")
			return
		}
		hash := "sha2-256"
		if k.kind == "ec-p384" {
			hash = "sha2-384"
		}
		pkcs1 := in.Algorithm == "pkcs1v15" || !strings.HasPrefix(k.kind, "rsa-")
		signature, ok := ring.sign(k, in.Input)
		if err != nil || !ok || !in.Prehashed || in.Version != 1 || !pkcs1 || in.Marshaling != "asn1" || r.PathValue("hash") != hash {
			refuse(w, http.StatusBadRequest, "invalid request")
			return
		}
		reply(w, map[string]any{"signature": "vault:v1:" + base64.StdEncoding.EncodeToString(signature), "key_version": 1})
	})
	mux.HandleFunc("POST "+at+"keys/{name}/config", func(w http.ResponseWriter, r *http.Request) {
		var in struct {
			Deletable bool `json:"deletion_allowed"`
		}
		if json.NewDecoder(io.LimitReader(r.Body, 1<<20)).Decode(&in) != nil || ring.keys[r.PathValue("name")] == nil {
			refuse(w, http.StatusBadRequest, "no existing key named "+r.PathValue("name")+" could be found")
			return
		}
		deletable[r.PathValue("name")] = in.Deletable
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("DELETE "+at+"keys/{name}", func(w http.ResponseWriter, r *http.Request) {
		name := r.PathValue("name")
		if ring.keys[name] == nil || !deletable[name] {
			refuse(w, http.StatusBadRequest, "error deleting policy "+name+": deletion is not allowed for this key")
			return
		}
		delete(ring.keys, name)
		delete(deletable, name)
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("GET "+at+"keys", func(w http.ResponseWriter, r *http.Request) {
		var names []string
		for _, k := range ring.sorted() {
			names = append(names, k.id)
		}
		switch {
		case r.FormValue("list") != "true":
			refuse(w, http.StatusMethodNotAllowed, "unsupported operation")
		case names == nil:
			refuse(w, http.StatusNotFound)
		default:
			reply(w, map[string]any{"keys": names})
		}
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		refuse(w, http.StatusNotFound, "no handler for route \""+r.URL.Path+"\". route entry not found.")
	})
	return ring.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Header.Get("X-Vault-Token") != TransitToken:
			refuse(w, http.StatusForbidden, "permission denied")
		case r.Header.Get("X-Vault-Namespace") != "team/":
			refuse(w, http.StatusNotFound, "no handler for route")
		default:
			mux.ServeHTTP(w, r)
		}
	}))
}
