package gcpiit

import (
	"encoding/json"
	"testing"
)

// FuzzAnswers feeds the readers of what Google signs and answers, and of the file of
// a service account.
func FuzzAnswers(f *testing.F) {
	f.Add([]byte(`{"google":{"compute_engine":{"project_id":"big-kahuna-123456","project_number":1,"zone":"us-west1-b","instance_id":"1","instance_name":"x"}},"email":"x@y"}`))
	f.Add([]byte(`{"access_token":"ya29.x","expires_in":3599}`))
	f.Add([]byte(`{"type":"service_account","client_email":"x","private_key":"-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n"}`))
	f.Add([]byte(`{"id":"1","metadata":{"items":[{"key":"a","value":"b"}]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var claims map[string]any
		if json.Unmarshal(data, &claims) == nil {
			if i, err := parseInstance(claims); err == nil && (!projectForm.MatchString(i.ProjectID) || !idForm.MatchString(i.ID)) {
				t.Errorf("took %q for claims", data)
			}
		}
		if token, life, err := parseToken(data); err == nil && (token == "" || life <= 0) {
			t.Errorf("took %q for a token", data)
		}
		if a, err := parseAccount(data); err == nil && a.key == nil {
			t.Errorf("took %q for an account", data)
		}
		var d described
		if json.Unmarshal(data, &d) == nil {
			_, _ = (&compute{c: ServerConfig{AllowedMetadataKeys: []string{"a"}}}).selectors(&d)
		}
	})
}
