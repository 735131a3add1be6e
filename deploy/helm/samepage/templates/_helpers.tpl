{{/* What the names of all objects begin with. */}}
{{- define "samepage.name" -}}
{{- default .Release.Name .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* Labels of every object; takes (list $ "component"). */}}
{{- define "samepage.labels" -}}
{{- $root := first . -}}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{ include "samepage.selector" . }}
app.kubernetes.io/part-of: samepage
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
{{- end }}

{{/* Labels that select a component's pods; takes (list $ "component"). */}}
{{- define "samepage.selector" -}}
app.kubernetes.io/name: samepage
app.kubernetes.io/instance: {{ (first .).Release.Name }}
app.kubernetes.io/component: {{ last . }}
{{- end }}

{{/* An image; takes (list $ component's-values). */}}
{{- define "samepage.image" -}}
{{- $root := first . -}}
{{- $image := (last .).image -}}
{{- $name := printf "%s/%s" $root.Values.image.registry $image.repository -}}
{{- if $image.digest -}}
{{ $name }}@{{ $image.digest }}
{{- else -}}
{{ $name }}:{{ default $root.Chart.AppVersion $root.Values.image.tag }}
{{- end -}}
{{- end }}

{{/* "true" or nothing: a switch, or what is recommended where it is null; takes (list $ switch). */}}
{{- define "samepage.on" -}}
{{- $switch := last . -}}
{{- if kindIs "invalid" $switch -}}
{{- if (first .).Values.recommendations.enabled }}true{{ end -}}
{{- else if $switch }}true{{ end -}}
{{- end }}

{{/* A priority class's line; takes (list $ chosen recommended). */}}
{{- define "samepage.priority" -}}
{{- $chosen := index . 1 -}}
{{- if kindIs "invalid" $chosen -}}
{{- if (first .).Values.recommendations.enabled }}priorityClassName: {{ last . }}{{ end -}}
{{- else if $chosen }}priorityClassName: {{ $chosen }}{{ end -}}
{{- end }}

{{/* A daemon's TOML: the chart's settings under the user's; takes (list "section" chart's user's). */}}
{{- define "samepage.toml" -}}
[{{ first . }}]
{{- $settings := mergeOverwrite (deepCopy (index . 1)) (last .) }}
{{- range $name, $value := $settings }}
{{- if kindIs "string" $value }}
{{ $name }} = {{ toJson $value }}
{{- else if kindIs "bool" $value }}
{{ $name }} = {{ $value }}
{{- else if eq (float64 (int64 $value)) (float64 $value) }}
{{ $name }} = {{ int64 $value }}
{{- else }}
{{ $name }} = {{ $value }}
{{- end }}
{{- end }}
{{- end }}

{{/* What every container may do: nothing. Takes the user's number. */}}
{{- define "samepage.confined" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
privileged: false
readOnlyRootFilesystem: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
{{- if . }}
runAsNonRoot: true
{{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Parts that all pods have; takes $. */}}
{{- define "samepage.pod" -}}
enableServiceLinks: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- end }}

{{/* Where pods go; takes the component's values. */}}
{{- define "samepage.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- with .affinity }}
affinity: {{ toJson . }}
{{- end }}
{{- end }}

{{/* Probes of a daemon; takes (list health-port "metrics-port's name"). Readiness is what the daemon
says; liveness is only whether its event loop turns, since what it waits for is no reason to kill. */}}
{{- define "samepage.probes" -}}
startupProbe:
  httpGet: {path: /metrics, port: {{ last . }}}
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /metrics, port: {{ last . }}}
  periodSeconds: 30
  timeoutSeconds: 10
  failureThreshold: 4
readinessProbe:
  grpc: {port: {{ first . }}}
  periodSeconds: 5
  timeoutSeconds: 3
{{- end }}

{{/* Names of Secrets. */}}
{{- define "samepage.secret" -}}
{{- default (printf "%s-cluster-secret" (include "samepage.name" .)) .Values.clusterSecret.existingSecret -}}
{{- end }}
{{/* Takes (list $ "role"). */}}
{{- define "samepage.tlsSecret" -}}
{{- $root := first . -}}
{{- if eq $root.Values.tls.mode "existingSecrets" -}}
{{- $name := index $root.Values.tls.existingSecrets (last .) -}}
{{- required (printf "tls.existingSecrets.%s: name a Secret with tls.crt, tls.key and ca.crt" (last .)) $name -}}
{{- else -}}
{{ include "samepage.name" $root }}-{{ last . }}-tls
{{- end -}}
{{- end }}

{{/* The chart's TLS settings of a daemon, as JSON; takes (list $ "role"). */}}
{{- define "samepage.tlsSettings" -}}
{{- if eq (first .).Values.tls.mode "disabled" -}}
{{ dict "insecure" true | toJson }}
{{- else -}}
{{- $dir := printf "/etc/samepage/tls/%s" (last .) -}}
{{ dict "tls_cert_file" (printf "%s/tls.crt" $dir) "tls_key_file" (printf "%s/tls.key" $dir) "tls_ca_file" (printf "%s/ca.crt" $dir) | toJson }}
{{- end -}}
{{- end }}

{{/* Whether there is a tryout Redis: "true" or nothing. */}}
{{- define "samepage.tryout" -}}
{{- if and .Values.index.enabled .Values.redis.enabled (not (include "samepage.external" .)) }}true{{ end -}}
{{- end }}
{{- define "samepage.external" -}}
{{- if or .Values.externalRedis.url .Values.externalRedis.urlKey }}true{{ end -}}
{{- end }}

{{- define "samepage.indexReplicas" -}}
{{- $stored := or (include "samepage.tryout" .) (include "samepage.external" .) -}}
{{- if kindIs "invalid" .Values.index.replicas -}}
{{- if and .Values.recommendations.enabled $stored }}2{{ else }}1{{ end -}}
{{- else -}}
{{ int .Values.index.replicas }}
{{- end -}}
{{- end }}

{{/* The chart's settings of who is who, as JSON; takes $. */}}
{{- define "samepage.identitySettings" -}}
{{- $settings := dict "identity" .Values.identity.mode -}}
{{- if eq .Values.identity.mode "token" -}}
{{- $settings = set $settings "token_audience" .Values.identity.audience -}}
{{- if .Values.identity.trustGroups -}}
{{- $settings = set $settings "identity_policy_file" "/etc/samepage/identity/policy.toml" -}}
{{- end -}}
{{- end -}}
{{ toJson $settings }}
{{- end }}

{{/* What an application's container and pod need: the node's sockets, and a token for them. Each takes $. */}}
{{- define "samepage.clientEnvironment" -}}
- {name: SAMEPAGE_DIR, value: /run/samepage}
{{- if eq .Values.identity.mode "token" }}
- {name: SAMEPAGE_TOKEN_FILE, value: /var/run/secrets/samepage.io/token}
{{- end }}
{{- end }}
{{- define "samepage.clientMounts" -}}
- {name: samepage, mountPath: /run/samepage, readOnly: true}
{{- if eq .Values.identity.mode "token" }}
- {name: samepage-token, mountPath: /var/run/secrets/samepage.io, readOnly: true}
{{- end }}
{{- end }}
{{- define "samepage.clientVolumes" -}}
- name: samepage
  hostPath: {path: {{ .Values.agent.socketDir }}, type: Directory}
{{- if eq .Values.identity.mode "token" }}
- name: samepage-token
  projected:
    sources: [{serviceAccountToken: {audience: {{ toJson .Values.identity.audience }}, expirationSeconds: 3600, path: token}}]
{{- end }}
{{- end }}

{{/* Where daemons listen for others. */}}
{{- define "samepage.anyAddress" -}}
{{ if .Values.ipv6 }}[::]{{ else }}0.0.0.0{{ end }}
{{- end }}
