package harness

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

var azureKeyName = regexp.MustCompile(`^[0-9a-zA-Z-]{1,127}$`)

// AzureIdentityHeader is the secret that a process shows for a token of its
// machine's identity, as in Azure's App Service: IDENTITY_HEADER.
const AzureIdentityHeader = "853b9a84-5bfa-4b22-a3f3-0b9a43d9ad8a"

// Identity is the endpoint of a machine's identity: IDENTITY_ENDPOINT.
func (a *Azure) Identity(t testing.TB) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		defer a.mu.Unlock()
		if r.Header.Get("X-Identity-Header") != AzureIdentityHeader || r.FormValue("api-version") != "2019-08-01" {
			http.Error(w, "", http.StatusUnauthorized)
			return
		}
		a.asked = append(a.asked, "managed identity")
		resource := r.FormValue("resource")
		a.issued = a.SignToken(t, a.machine.Claims(resource))
		_ = json.NewEncoder(w).Encode(map[string]string{
			"access_token": a.issued, "expires_on": fmt.Sprint(time.Now().Add(24 * time.Hour).Unix()), "resource": resource, "token_type": "Bearer",
		})
	})
}

// Vault is an Azure Key Vault. Requests must have a token of the machine's identity
// that is for vaults.
func (a *Azure) Vault(ring *KeyRing) http.Handler {
	b64 := base64.RawURLEncoding.EncodeToString
	mux := http.NewServeMux()
	refuse := func(w http.ResponseWriter, code int, text string) {
		w.WriteHeader(code)
		fmt.Fprintf(w, `{"error":{"code":%q,"message":"no"}}`, text)
	}
	reply := func(w http.ResponseWriter, value any) { _ = json.NewEncoder(w).Encode(value) }
	const version = "78deebed173b48e48f55abf87ed4cf71"
	describe := func(r *http.Request, k *ringKey) map[string]any {
		jwk := map[string]any{"kid": "http://" + r.Host + "/keys/" + k.id + "/" + version, "key_ops": []string{"sign", "verify"}}
		switch public := ring.public(k).(type) {
		case *ecdsa.PublicKey:
			size := public.Params().BitSize / 8
			raw, err := public.Bytes()
			if err != nil {
				panic(err)
			}
			jwk["kty"], jwk["crv"], jwk["x"], jwk["y"] = "EC", public.Params().Name, b64(raw[1:1+size]), b64(raw[1+size:])
		case *rsa.PublicKey:
			jwk["kty"], jwk["n"], jwk["e"] = "RSA", b64(public.N.Bytes()), "AQAB"
		}
		return map[string]any{"key": jwk, "attributes": map[string]any{"enabled": true, "created": k.created.Unix()}, "tags": k.tags}
	}
	one := func(do func(http.ResponseWriter, *http.Request, *ringKey)) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			k := ring.keys[r.PathValue("name")]
			if k == nil || k.deleted {
				refuse(w, http.StatusNotFound, "KeyNotFound")
				return
			}
			do(w, r, k)
		}
	}
	mux.HandleFunc("POST /keys/{name}/create", func(w http.ResponseWriter, r *http.Request) {
		var in struct {
			Kty        string            `json:"kty"`
			Crv        string            `json:"crv"`
			Size       int               `json:"key_size"`
			Ops        []string          `json:"key_ops"`
			Tags       map[string]string `json:"tags"`
			Attributes struct {
				Exportable bool `json:"exportable"`
			} `json:"attributes"`
		}
		err := json.NewDecoder(io.LimitReader(r.Body, 1<<20)).Decode(&in)
		kind := map[string]string{"P-256": "ec-p256", "P-384": "ec-p384"}[in.Crv]
		if in.Kty == "RSA" {
			kind = fmt.Sprintf("rsa-%d", in.Size)
		}
		name := r.PathValue("name")
		switch {
		case err != nil || kind == "" || in.Attributes.Exportable || !azureKeyName.MatchString(name) || len(in.Tags) > 15:
			refuse(w, http.StatusBadRequest, "BadParameter")
		case ring.keys[name] != nil && ring.keys[name].deleted:
			refuse(w, http.StatusConflict, "Conflict")
		default:
			reply(w, describe(r, ring.make(name, kind, in.Tags)))
		}
	})
	mux.HandleFunc("GET /keys/{name}", one(func(w http.ResponseWriter, r *http.Request, k *ringKey) { reply(w, describe(r, k)) }))
	mux.HandleFunc("POST /keys/{name}/{version}/sign", one(func(w http.ResponseWriter, r *http.Request, k *ringKey) {
		var in struct {
			Alg   string `json:"alg"`
			Value string `json:"value"`
		}
		err := json.NewDecoder(io.LimitReader(r.Body, 1<<20)).Decode(&in)
		digest, bad := base64.RawURLEncoding.DecodeString(in.Value)
		want := map[string]string{"ec-p256": "ES256", "ec-p384": "ES384"}[k.kind]
		if want == "" {
			want = "RS256"
		}
		signature, ok := ring.sign(k, digest)
		if err != nil || bad != nil || !ok || in.Alg != want || r.PathValue("version") != version {
			refuse(w, http.StatusBadRequest, "BadParameter")
			return
		}
		if want != "RS256" && len(signature) > 0 { // R and S, RFC 7518 §3.4
			var rs struct{ R, S *big.Int }
			if _, err := asn1.Unmarshal(signature, &rs); err != nil {
				panic(err)
			}
			size := len(digest)
			signature = append(rs.R.FillBytes(make([]byte, size)), rs.S.FillBytes(make([]byte, size))...)
		}
		reply(w, map[string]string{"kid": "http://" + r.Host + "/keys/" + k.id + "/" + version, "value": b64(signature)})
	}))
	mux.HandleFunc("DELETE /keys/{name}", one(func(w http.ResponseWriter, r *http.Request, k *ringKey) {
		k.deleted = true
		reply(w, describe(r, k))
	}))
	mux.HandleFunc("GET /keys", func(w http.ResponseWriter, r *http.Request) {
		out := map[string]any{"value": []any{}}
		keys := ring.sorted()
		for i, k := range keys {
			if k.id <= r.FormValue("$skiptoken") {
				continue
			}
			out["value"] = []any{map[string]any{
				"kid": "http://" + r.Host + "/keys/" + k.id, "attributes": map[string]any{"enabled": true, "created": k.created.Unix()}, "tags": k.tags,
			}}
			if i < len(keys)-1 {
				out["nextLink"] = "http://" + r.Host + "/keys?api-version=7.4&maxresults=25&$skiptoken=" + k.id
			}
			break
		}
		reply(w, out)
	})
	return ring.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		var claims jwt.Claims
		token, err := jwt.ParseSigned(text, []jose.SignatureAlgorithm{jose.RS256})
		switch {
		case err != nil || token.Claims(a.RootKey.Public(), &claims) != nil ||
			claims.Validate(jwt.Expected{AnyAudience: []string{"https://vault.azure.net"}, Time: time.Now()}) != nil:
			refuse(w, http.StatusUnauthorized, "Unauthorized")
		case r.FormValue("api-version") != "7.4":
			refuse(w, http.StatusBadRequest, "BadParameter")
		default:
			mux.ServeHTTP(w, r)
		}
	}))
}
