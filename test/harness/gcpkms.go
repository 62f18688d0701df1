package harness

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
)

var googleKinds = map[string]string{
	"EC_SIGN_P256_SHA256": "ec-p256", "EC_SIGN_P384_SHA384": "ec-p384", "RSA_SIGN_PKCS1_2048_SHA256": "rsa-2048",
	"RSA_SIGN_PKCS1_3072_SHA256": "rsa-3072", "RSA_SIGN_PKCS1_4096_SHA256": "rsa-4096",
}

var googleKeyID = regexp.MustCompile(`^[a-zA-Z0-9_-]{1,63}$`)

// KMS is Cloud KMS, with one key ring: projects/p/locations/l/keyRings/r. Requests
// must have a token of [GCP.API]'s. A key is being made when it is first asked for.
func (g *GCP) KMS(ring *KeyRing) http.Handler {
	const at = "/v1/projects/p/locations/l/keyRings/r/cryptoKeys"
	mux := http.NewServeMux()
	refuse := func(w http.ResponseWriter, code int, status string) {
		w.WriteHeader(code)
		fmt.Fprintf(w, `{"error":{"code":%d,"message":"no","status":%q}}`, code, status)
	}
	reply := func(w http.ResponseWriter, value any) { _ = json.NewEncoder(w).Encode(value) }
	pending := make(map[string]bool)
	one := func(do func(http.ResponseWriter, *http.Request, *ringKey)) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			k := ring.keys[r.PathValue("key")]
			if k == nil {
				refuse(w, http.StatusNotFound, "NOT_FOUND")
				return
			}
			do(w, r, k)
		}
	}
	version := func(k *ringKey) map[string]any {
		state := "ENABLED"
		switch {
		case pending[k.id]:
			state = "PENDING_GENERATION"
		case k.gone:
			state = "DESTROYED"
		case k.deleted:
			state = "DESTROY_SCHEDULED"
		}
		return map[string]any{"name": at[4:] + "/" + k.id + "/cryptoKeyVersions/1", "state": state, "createTime": k.created.UTC().Format("2006-01-02T15:04:05.999999999Z")}
	}
	mux.HandleFunc("POST "+at, func(w http.ResponseWriter, r *http.Request) {
		var in struct {
			Purpose         string `json:"purpose"`
			VersionTemplate struct {
				Algorithm       string `json:"algorithm"`
				ProtectionLevel string `json:"protectionLevel"`
			} `json:"versionTemplate"`
			Labels map[string]string `json:"labels"`
		}
		id := r.FormValue("cryptoKeyId")
		err := json.NewDecoder(io.LimitReader(r.Body, 1<<20)).Decode(&in)
		kind := googleKinds[in.VersionTemplate.Algorithm]
		for name, value := range in.Labels {
			if len(name) > 63 || len(value) > 63 || strings.ToLower(value) != value || strings.ContainsAny(value, "./ ") {
				kind = ""
			}
		}
		switch {
		case err != nil || !googleKeyID.MatchString(id) || in.Purpose != "ASYMMETRIC_SIGN" || kind == "":
			refuse(w, http.StatusBadRequest, "INVALID_ARGUMENT")
		case ring.keys[id] != nil:
			refuse(w, http.StatusConflict, "ALREADY_EXISTS")
		default:
			k := ring.make(id, kind, in.Labels)
			pending[id] = true
			reply(w, map[string]any{"name": at[4:] + "/" + k.id, "purpose": in.Purpose, "labels": in.Labels})
		}
	})
	mux.HandleFunc("GET "+at, func(w http.ResponseWriter, r *http.Request) {
		owner, ok := strings.CutPrefix(r.FormValue("filter"), "labels.hallmark-owner=")
		if !ok {
			refuse(w, http.StatusBadRequest, "INVALID_ARGUMENT")
			return
		}
		var list []any
		next := ""
		for id, k := range ring.keys {
			if k.tags["hallmark-owner"] == owner && id > r.FormValue("pageToken") && (next == "" || id < next) {
				next = id // one a page, in order
			}
		}
		if k := ring.keys[next]; k != nil {
			list = append(list, map[string]any{"name": at[4:] + "/" + k.id, "labels": k.tags})
		}
		reply(w, map[string]any{"cryptoKeys": list, "nextPageToken": next})
	})
	mux.HandleFunc("GET "+at+"/{key}/cryptoKeyVersions/1", one(func(w http.ResponseWriter, _ *http.Request, k *ringKey) {
		reply(w, version(k))
		delete(pending, k.id)
	}))
	mux.HandleFunc("GET "+at+"/{key}/cryptoKeyVersions/1/publicKey", one(func(w http.ResponseWriter, _ *http.Request, k *ringKey) {
		if k.deleted {
			refuse(w, http.StatusBadRequest, "FAILED_PRECONDITION")
			return
		}
		reply(w, map[string]any{"pem": ring.publicPEM(k)})
	}))
	mux.HandleFunc("POST "+at+"/{key}/cryptoKeyVersions/{action}", one(func(w http.ResponseWriter, r *http.Request, k *ringKey) {
		switch r.PathValue("action") {
		case "1:destroy":
			k.deleted = true
			reply(w, version(k))
		case "1:asymmetricSign":
			var in struct {
				Digest map[string][]byte `json:"digest"`
			}
			member := map[string]string{"ec-p384": "sha384"}[k.kind]
			if member == "" {
				member = "sha256"
			}
			err := json.NewDecoder(io.LimitReader(r.Body, 1<<20)).Decode(&in)
			signature, ok := ring.sign(k, in.Digest[member])
			if err != nil || !ok || k.deleted || pending[k.id] {
				refuse(w, http.StatusBadRequest, "INVALID_ARGUMENT")
				return
			}
			reply(w, map[string]any{"signature": signature, "protectionLevel": "SOFTWARE"})
		default:
			refuse(w, http.StatusNotFound, "NOT_FOUND")
		}
	}))
	mux.HandleFunc("DELETE "+at+"/{key}/cryptoKeyVersions/1", one(func(w http.ResponseWriter, _ *http.Request, k *ringKey) {
		if !k.gone {
			refuse(w, http.StatusBadRequest, "FAILED_PRECONDITION")
			return
		}
		reply(w, map[string]any{"name": "operations/1", "done": true})
	}))
	mux.HandleFunc("DELETE "+at+"/{key}", one(func(w http.ResponseWriter, _ *http.Request, k *ringKey) {
		delete(ring.keys, k.id)
		reply(w, map[string]any{"name": "operations/2", "done": true})
	}))
	return ring.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer ya29.token" {
			refuse(w, http.StatusUnauthorized, "UNAUTHENTICATED")
			return
		}
		mux.ServeHTTP(w, r)
	}))
}

// Destroy has the time go by after which a key that is to be destroyed is.
func (r *KeyRing) Destroy() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, k := range r.keys {
		k.gone = k.gone || k.deleted
	}
}

// Left returns how many keys there are, deleted ones among them.
func (r *KeyRing) Left() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.keys)
}
