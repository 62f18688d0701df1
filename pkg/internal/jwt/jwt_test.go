package jwt_test

import (
	"encoding/base64"
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/pkg/internal/jwt"
)

// FuzzParse looks for tokens that encoding/json reads differently.
func FuzzParse(f *testing.F) {
	f.Add(`{"alg":"ES256","kid":"k","typ":"JWT"}`, `{"sub":"spiffe://example.org/a","aud":["us"],"exp":1.5,"x":{"y":[null,true]}}`, "AA")
	f.Add(`{"alg":"none"}`, `[]`, "")
	f.Fuzz(func(t *testing.T, header, claims, signature string) {
		encode := base64.RawURLEncoding.EncodeToString
		token, err := jwt.Parse(encode([]byte(header)) + "." + encode([]byte(claims)) + "." + signature)
		if err != nil {
			return
		}
		for text, got := range map[string]map[string]any{header: token.Header, claims: token.Claims} {
			var want map[string]any
			d := json.NewDecoder(strings.NewReader(text))
			d.UseNumber()
			if err := d.Decode(&want); err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("%q is read as %v; encoding/json: %v, %v", text, got, want, err)
			}
		}
	})
}
